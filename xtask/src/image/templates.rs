//! What is checked of `deploy/aws` without an account: the CloudFormation template by its linter and as a stack in a
//! double of AWS, the Terraform module against the provider's schema, and what they tell a router by the router
//! itself.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::kernels::gone;
use crate::run;

const FOLDER: &str = "deploy/aws";
const TEMPLATE: &str = "deploy/aws/cloudformation.yaml";
const MODULE: &str = "deploy/aws/terraform";
/// Beside the programs that run them.
const SCRIPTS: &str = "xtask/src/image";
/// Whose wheel has the schema of the provider. It is read, and not installed.
const SCHEMA: [&str; 2] = ["cdktn_provider_aws", "25.8.1"];

/// Looks at all of it. `sluice` judges the configurations.
pub(super) fn check(sluice: &Path) -> Result<()> {
    let tools = Tools::bring()?;
    let linter = tools.python().join("bin/cfn-lint");
    run::show(tools.run(&linter).arg(TEMPLATE))?;
    let drafts = tools.folder.join("user-data");
    gone(fs::remove_dir_all(&drafts))?;
    fs::create_dir_all(&drafts).with_context(|| drafts.display().to_string())?;
    run::show(tools.script("stack.py").arg(FOLDER).arg(&drafts))?;
    run::show(tools.script("module.py").arg(MODULE).arg(&tools.schema))?;
    match ["tofu", "terraform"]
        .into_iter()
        .find(|name| run::which(name).is_some())
    {
        Some(program) => render(program, &tools.folder, &drafts)?,
        None => {
            println!("skipped: no tofu and no terraform is here to render the module's user data")
        }
    }
    let mut judged = 0;
    for entry in fs::read_dir(&drafts).with_context(|| drafts.display().to_string())? {
        let file = entry.with_context(|| drafts.display().to_string())?.path();
        run::show(run::command(sluice).arg("check-config").arg(&file))?;
        judged += 1;
    }
    ensure!(judged >= 2, "the stacks have left no user data");
    Ok(())
}

/// A folder with `python` and `moto_server` in it, as a virtual environment has them, for the tests of `cloud::moto`.
pub(super) fn moto() -> Result<PathBuf> {
    let tools = Tools::bring()?;
    let folder = tools.folder.join("moto");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let path = tools.python();
    let path = path.display();
    for (name, program) in [
        ("python", String::new()),
        ("moto_server", format!("'{path}/bin/moto_server'")),
    ] {
        let file = folder.join(name);
        let script = format!("#!/bin/sh\nPYTHONPATH='{path}' exec python3 {program} \"$@\"\n");
        fs::write(&file, script).with_context(|| file.display().to_string())?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755))
            .with_context(|| file.display().to_string())?;
    }
    Ok(folder)
}

/// What the checks need of Python, in `target/images`.
struct Tools {
    folder: PathBuf,
    schema: PathBuf,
}

impl Tools {
    fn bring() -> Result<Self> {
        let folder = run::repository().join("target/images");
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        let [name, version] = SCHEMA;
        let tools = Self {
            schema: folder.join(format!("{name}-{version}-py3-none-any.whl")),
            folder,
        };
        let wanted = run::repository().join(SCRIPTS).join("requirements.txt");
        let wanted = fs::read_to_string(&wanted).with_context(|| wanted.display().to_string())?;
        let mark = tools.folder.join("requirements.txt");
        if fs::read_to_string(&mark).is_ok_and(|had| had == wanted) {
            return Ok(tools);
        }
        gone(fs::remove_dir_all(tools.python()))?;
        let pip = |task: &str| {
            let mut pip = run::command("python3");
            pip.args([
                "-m",
                "pip",
                "--disable-pip-version-check",
                "--no-input",
                task,
            ]);
            pip
        };
        let list = format!("{SCRIPTS}/requirements.txt");
        let mut install = pip("install");
        // Beside the machine's own, which stay as they are.
        install
            .args(["--requirement", &list, "--target"])
            .arg(tools.python());
        run::long(
            "linter, double of AWS",
            install.env("PIP_ROOT_USER_ACTION", "ignore"),
        )?;
        let mut download = pip("download");
        download.args(["--no-deps", "--dest"]).arg(&tools.folder);
        run::long(
            "the provider's schema",
            download.arg(format!("{name}=={version}")),
        )?;
        // At the end, so that nothing half-made is taken for whole.
        fs::write(&mark, wanted).with_context(|| mark.display().to_string())?;
        Ok(tools)
    }

    fn python(&self) -> PathBuf {
        self.folder.join("python")
    }

    /// Python with this program.
    fn run(&self, program: &Path) -> Command {
        let mut python = run::command("python3");
        python.arg(program).env("PYTHONPATH", self.python());
        python
    }

    fn script(&self, name: &str) -> Command {
        self.run(&Path::new(SCRIPTS).join(name))
    }
}

/// Has the module's part without a provider render user data, as it is by default and with all that it takes.
fn render(program: &str, scratch: &Path, to: &Path) -> Result<()> {
    let folder = scratch.join("module");
    gone(fs::remove_dir_all(&folder))?;
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    for name in ["main.tf", "sluice.toml.tftpl"] {
        let from = run::repository().join(MODULE).join("user-data").join(name);
        fs::copy(&from, folder.join(name)).with_context(|| from.display().to_string())?;
    }
    let run_it = |words: &[&str]| {
        let mut command = run::command(program);
        command.current_dir(&folder).args(words);
        run::read(&mut command)
    };
    run_it(&["init", "-input=false"])?;
    let few: &[&str] = &[r#"routes=["auto:vpc"]"#];
    let all: &[&str] = &[
        r#"routes=["10.0.0.0/16", "fd00:10::/56"]"#,
        "control_url=https://headscale.example.com:8443",
        r#"tags_in_tailnet=["tag:router", "tag:prod"]"#,
        "listen_port=443",
        "snat=false",
        r#"vpc_route_tables=["rtb-0123456789abcdef0"]"#,
        "more_config=[policy]\ndenied = \"reject\"\n",
    ];
    for (name, variables) in [("module-few", few), ("module-all", all)] {
        let mut words = vec!["apply", "-auto-approve", "-input=false"];
        words.extend(["-var", "auth_key_parameter=/sluice/auth-key"]);
        words.extend(variables.iter().flat_map(|variable| ["-var", variable]));
        run_it(&words)?;
        let toml = run_it(&["output", "-raw", "toml"])?;
        if toml.is_empty() {
            bail!("{program} renders nothing");
        }
        let file = to.join(format!("{name}.toml"));
        fs::write(&file, toml).with_context(|| file.display().to_string())?;
    }
    run::read(run::command(program).args(["fmt", "-check", "-recursive", MODULE]))
        .context("the module is not formatted")
        .map(drop)
}
