"""The description of the whole surface: /openapi.json for tools, /docs for people."""
