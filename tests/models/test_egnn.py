from encoder_contract import EncoderContract
from mspt.models.encoders import egnn


class TestEGNN(EncoderContract):
    settings = egnn.TINY
