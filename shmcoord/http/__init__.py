"""Plug-ins for HTTP: an ASGI middleware publishes load, an httpx transport routes by it."""
