def main() -> None:
    print("mm")
