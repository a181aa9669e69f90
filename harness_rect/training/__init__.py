"""Training what some editing methods need before they can edit."""
