"""What produces the numbers in the documentation, and no user of the library runs."""
