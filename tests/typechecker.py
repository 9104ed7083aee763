"""How annotations are checked while the tests run: beartype's, where an `int` may stand for a `float`."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
