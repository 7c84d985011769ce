"""What all HTML reports share: styles and script, the colours of plots, and the page of a companion job."""
