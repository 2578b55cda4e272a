//! How large the programs are, and what they cost the verifier: told, and held to limits, so that
//! growth is seen where it happens. Kernels refuse a million steps and 512 bytes of stack.

use std::collections::BTreeMap;

use anyhow::{Context, ensure};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _};
use router::datapath::ebpf::object as ebpf_object;
use router_ebpf::abi::Side;

use super::fixture::*;

/// Steps of the verifier, of one program with all its functions: each start of the daemon waits for
/// them.
const STEPS: u32 = 90_000;
/// Instructions of one program with all its functions, as the kernel has them.
const INSTRUCTIONS: u32 = 9_500;
/// Bytes of stack of one function.
const STACK: u32 = 336;

#[test]
fn the_programs_cost_the_verifier_no_more_than_they_may() {
    lab::test(|lab| {
        router(lab)?.enter(|| {
            let fixture = Fixture::new(None)?;
            for side in Side::ALL {
                let info = fixture.ebpf.program(side)?.info()?;
                let instructions = info.size_translated().context("no size")? / 8;
                // Since Linux 5.16.
                let steps = info.verified_instruction_count();
                println!(
                    "{}: {instructions} instructions, {steps:?} steps of the verifier",
                    side.program()
                );
                ensure!(instructions <= INSTRUCTIONS, "{instructions} instructions");
                if let Some(steps) = steps {
                    ensure!(steps <= STEPS, "{steps} steps of the verifier");
                }
            }
            Ok(())
        })?
    });
}

#[test]
fn no_function_takes_more_of_the_stack_than_it_may() {
    let file = object::File::parse(ebpf_object()).unwrap();
    let mut stacks = BTreeMap::new();
    for symbol in file.symbols() {
        let (Some(section), Ok(name)) = (symbol.section_index(), symbol.name()) else {
            continue;
        };
        if symbol.kind() != object::SymbolKind::Text || symbol.size() == 0 {
            continue;
        }
        let code = file.section_by_index(section).unwrap().data().unwrap();
        let start = symbol.address() as usize;
        let code = &code[start..start + symbol.size() as usize];
        stacks.insert(name.to_owned(), stack(code));
    }
    for (name, bytes) in &stacks {
        println!("{bytes:4} bytes of stack: {name}");
    }
    assert!(stacks.len() > 10, "functions: {}", stacks.len());
    let (name, most) = stacks.iter().max_by_key(|(_, bytes)| **bytes).unwrap();
    assert!(*most > 0 && *most <= STACK, "{name}: {most} bytes of stack");
}

/// Bytes of stack that a function reaches, by the addresses that it makes of the frame pointer.
fn stack(code: &[u8]) -> u32 {
    const FRAME: u8 = 10;
    const MOVE: u8 = 0xbf;
    const ADD: u8 = 0x07;
    let mut deepest = 0;
    let mut copies = [false; 16];
    for instruction in code.chunks_exact(8) {
        let [opcode, registers, low, high, imm @ ..] = instruction else {
            continue;
        };
        let (to, from) = (registers & 15, registers >> 4);
        let offset = i32::from(i16::from_le_bytes([*low, *high]));
        let imm = i32::from_le_bytes([imm[0], imm[1], imm[2], imm[3]]);
        let reached = match (opcode & 7, *opcode) {
            // LDX reads from its source; ST and STX write to their destination.
            (1, _) if from == FRAME => offset,
            (2 | 3, _) if to == FRAME => offset,
            (_, ADD) if copies[usize::from(to)] => imm,
            _ => 0,
        };
        deepest = deepest.min(reached);
        copies[usize::from(to)] = *opcode == MOVE && from == FRAME;
    }
    deepest.unsigned_abs()
}
