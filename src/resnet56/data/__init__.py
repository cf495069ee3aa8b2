"""Data sets, image files, augmentation and training batches."""
