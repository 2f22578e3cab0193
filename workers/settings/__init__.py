"""What a person may set, validated section by section. Starts no Ray."""
