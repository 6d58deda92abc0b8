"""Predictions over HTTP, and a page that shows them: `dpt serve`. It needs FastAPI and uvicorn: pip install '.[serve]'."""
