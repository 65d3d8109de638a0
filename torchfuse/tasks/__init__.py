"""What recipes share above generation: prompts, conversations, predictions, evaluation, reports."""
