"""Talking with a model in a terminal: ``clusterfusion chat MODEL``.

Needs the extra ``chat``: ``python -m pip install 'clusterfusion-lm[chat]'``.
"""
