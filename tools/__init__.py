"""Programs beside script.py, each run as `python -m tools.NAME`."""
