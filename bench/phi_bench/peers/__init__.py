"""Programs and files of other projects: how they are built, found and made."""
