"""The comparison in Weights & Biases: dashboards, the report's files as artifacts, and runs read back into folders."""
