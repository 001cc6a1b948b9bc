"""Adapters of Hugging Face PEFT, read and written.

Strict both ways: a tensor that answers to nothing, a module that is not there, a setting that means another
computation is an error that lists all of them, and nothing is attached or written then. What no file holds is not
guessed.
"""
