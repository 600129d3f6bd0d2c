"""Looking after a work folder: status, retry, pack, verify."""
