"""The parts that script.py is made of. None of them imports it or knows its settings class."""
