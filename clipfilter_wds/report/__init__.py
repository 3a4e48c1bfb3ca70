"""Makes one HTML page that shows what a threshold keeps."""
