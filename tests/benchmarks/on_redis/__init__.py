"""What is measured on a real Redis."""
