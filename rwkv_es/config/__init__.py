"""What can be set: options, and the files that hold them."""
