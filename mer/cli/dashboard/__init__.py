"""The dashboard of `mer top`: what it shows (panels, heat map), and the program around it."""
