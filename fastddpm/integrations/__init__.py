"""fastddpm inside other libraries. Nothing is imported from here: diffusers.py and diffusers_resnet.py import diffusers."""
