"""Positions, margin and loans carried along every path: the ledger and how to build one."""

from qpo_sim.book.build import build_book
from qpo_sim.book.ledger import ACCOUNTS, Book, Conditional, Loan, Perpetual

__all__ = ["ACCOUNTS", "Book", "Conditional", "Loan", "Perpetual", "build_book"]
