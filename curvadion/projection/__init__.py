"""Bytes, time per step and speed-up over a link, from formulas: nothing here is measured."""
