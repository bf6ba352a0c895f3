"""Run the command line as `python -m gaq_export`."""

from gaq_export.cli.app import app

if __name__ == "__main__":
    app()
