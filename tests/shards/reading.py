"""Read a Source as a build does: every chunk pickled, read, and each record checked."""

import pickle

from mspt.data.schema import RejectedRecord, validate


def read(source, size=3):
    """All of a Source in chunks of size -> its Records, its RejectedRecords; what the schema refuses is among these."""
    source, records, rejects = pickle.loads(pickle.dumps(source)), [], []
    for chunk in pickle.loads(pickle.dumps(list(source.chunks(size)))):
        for item in source.read(chunk):
            try:
                if isinstance(item, RejectedRecord):
                    raise item
                validate(item)
                records.append(item)
            except RejectedRecord as error:
                rejects.append(error)
    return records, rejects
