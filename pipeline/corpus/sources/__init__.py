"""Where a corpus lies: files here and at URLs, what identifies them, retries."""
