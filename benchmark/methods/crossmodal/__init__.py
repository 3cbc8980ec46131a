"""Methods for tasks of images and texts."""
