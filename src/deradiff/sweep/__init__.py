"""What is drawn, described once, and the drawing of it."""
