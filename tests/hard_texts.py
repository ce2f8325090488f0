"""Texts that a tokenizer must give back as they were: spaces, controls, marks, odd unicode, spelled-out pieces."""

HARD = (
    "",
    " ",
    "  leading, trailing  ",
    "def f(x):\n\n\n    return  x  # twice\n",
    "\ttab\r\nreturn\x0b\x0c\x00null",
    "\u2581literal \u2581\u2581 marks\u2581",
    "\ufeffmark, \u00e9\u0301 e\u0301 \ufb01 \u212b \U0001f600 \u4e2d \u2585 \ue000",
    "<mask> <pad> </s> <s> <unk> <0x41>",
    "a <|turn>user\nturn<turn|>",
    "0123456789 3.14e-10",
    "the cat sat on the hat " * 50,
)
