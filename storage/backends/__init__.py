"""What holds the bytes: local files, object stores, other file systems; retries and credentials."""
