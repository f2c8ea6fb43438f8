"""One file per raw format; each yields molecules or records."""
