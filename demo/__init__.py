"""The bundled demo: how its model and data were made."""
