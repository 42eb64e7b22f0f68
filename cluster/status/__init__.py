"""What people look at: `GET /cluster`, the page at `/`, a step's picture, and `nanoserve status`."""
