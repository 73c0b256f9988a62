"""Integrations with other libraries. This file imports nothing; diffusers.py and diffusers_resnet.py import diffusers."""
