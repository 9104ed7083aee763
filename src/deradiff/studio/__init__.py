"""The studio: a dial to turn and a curve to draw, in a web page."""
