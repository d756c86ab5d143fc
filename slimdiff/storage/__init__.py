"""Storage: files and folders that appear whole, and the manifests that describe them."""
