"""Which rows of a long column of texts are equal."""

import numpy as np


def groups(words, text):
    """Rows with equal texts -> lists of two or more rows, each in order, ordered by their first row.

    words: int64 [N], a hash of each text, 0 for a row that takes no part. text(row): asked only where hashes agree.
    """
    order = np.argsort(words, kind="stable")
    again = words[order[1:]] == words[order[:-1]]
    rows = np.unique(np.concatenate([order[1:][again], order[:-1][again]]))
    found = {}
    for row in rows[words[rows] != 0].tolist():
        found.setdefault(text(row), []).append(row)
    return [group for group in found.values() if len(group) > 1]
