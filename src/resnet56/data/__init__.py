"""Images: data sets and their files, augmentation, and the batches of a training."""
