"""From files to batches: questions about images, masks, collation."""
