"""Files of any kind: strict JSON, directories of tensors, atomic writing."""
