"""Private interfaces of other packages that rayfin uses, behind public names.

A module for each package declares its private names (`PrivateName`), each with what rayfin needs it
for and what public interface would replace it, and offers functions and classes over them. No other
part of rayfin uses a private name or assigns to an attribute of an imported module or class.
"""
