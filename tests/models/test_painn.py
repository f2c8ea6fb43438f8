from encoder_contract import EncoderContract
from mspt.models.encoders import painn


class TestPaiNN(EncoderContract):
    settings = painn.TINY
