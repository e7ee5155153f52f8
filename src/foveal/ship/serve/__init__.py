"""A Bundle behind a URL: FastAPI and uvicorn over the exported model, with dynamic batching and a page to try it."""
