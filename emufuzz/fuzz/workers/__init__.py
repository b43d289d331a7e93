"""Worker processes: the same body whatever started them, here or on other machines."""
