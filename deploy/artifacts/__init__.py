"""What commands and builds write: names, numbers and files."""
