"""HTML pages: theme and script, plots, screenshots, and the page of a companion job."""
