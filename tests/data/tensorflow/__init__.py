"""A dataset that TensorFlow wrote, and what TensorFlow reads of it: to compare with, where TensorFlow is not."""
