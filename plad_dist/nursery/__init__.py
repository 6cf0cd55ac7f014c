"""Nursery: processes that have imported the large libraries before they are needed.

A server on each node imports them once and forks a child for whoever asks. Without a server a child
is a new interpreter, which imports for itself; everything else is the same.
"""
