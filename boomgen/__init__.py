"""boomgen: run a whole labelled image data set through Boomerang local sampling."""

__version__ = "0.1.0"
