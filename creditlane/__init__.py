"""creditlane: what an upstream service installs to charge credits through a broker."""

from creditlane.codes import Code

__all__ = ["Code"]
