"""Types of command-line arguments."""

import argparse


def at_least(least):
    """The type of a whole number that is no smaller."""

    def number(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of {least} or more")
        return value

    return number
